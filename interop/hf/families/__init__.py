"""Model families of transformers, with one file per group of related families."""
