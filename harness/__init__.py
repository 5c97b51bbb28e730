"""The harness: configuration, composition, decoding engine and evidence."""
