"""What every room stands on: errors, files, hashes, records, the workdir, stopping, and what a
command is."""
