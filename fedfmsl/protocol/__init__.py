"""What server and device agree on: bundle, layout of trainables, topics, messages, encodings. No network."""
