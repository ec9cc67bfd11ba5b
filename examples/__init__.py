"""Programs around siren.py; README.md says what to read for what."""
