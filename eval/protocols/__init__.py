"""Named protocols of picture evaluation: small versioned files, so that a figure says all of how it was taken."""
