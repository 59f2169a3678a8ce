"""Files that come with the package: the embedded model and its card."""
