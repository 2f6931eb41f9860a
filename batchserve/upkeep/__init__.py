"""Long-term maintenance: retention, sweeps, backups and checks for damage."""
