"""The contract between the rooms: bundle, layout of trainables, topics, messages, errors. No torch, no network."""
