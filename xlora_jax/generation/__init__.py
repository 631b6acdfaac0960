"""Text generation: decoding with one cache per pass, drafting, sampling."""
