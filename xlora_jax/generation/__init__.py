"""Text from prompts: decoding with one cache per pass, drafting, sampling."""
