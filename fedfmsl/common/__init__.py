"""Parts of every process: command line, settings, logging, atomic files, systemd notifications."""
