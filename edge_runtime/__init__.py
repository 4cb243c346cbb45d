"""The device: images or texts, features, engines, both experts, the gate, and the daemon around them. No torch."""
