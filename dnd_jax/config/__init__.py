"""Settings: what each means and may be (schema), and how a file of configs/ becomes them (load)."""
