"""What every process uses: command line, log, atomic files, systemd notifications."""
