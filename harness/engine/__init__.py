"""The decoding wing: models, cache, drafters, acceptance and the loop. Knows nothing of the evidence wing."""
