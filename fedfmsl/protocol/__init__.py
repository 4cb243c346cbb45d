"""What server and devices share: bundle, layout of trainables, topics, messages, encodings. No network."""
