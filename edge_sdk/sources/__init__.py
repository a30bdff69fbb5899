"""Files and folders as sources of rows: arrays, images, tables."""
