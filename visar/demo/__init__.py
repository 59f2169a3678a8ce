"""The demo in a browser: images while they are decoded, what each pass kept, and two samplers side by side."""
