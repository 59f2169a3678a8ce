"""The demo in a browser: images during decoding, accepted tokens of each pass, and two samplers side by side."""
