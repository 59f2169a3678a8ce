"""The demo in a browser: pictures while they are decoded, what each pass kept, and two samplers side by side."""
