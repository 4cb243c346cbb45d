"""The device: images, features, engines, both experts, the gate, and the daemon around them. No torch."""
