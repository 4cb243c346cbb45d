"""Certificates, the broker kit, board detection, the systemd unit and the installation of a device."""
