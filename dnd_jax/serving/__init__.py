"""What answers requests: generated adapters over HTTP, kept in a folder of limited size."""
