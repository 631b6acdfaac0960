"""Model families of transformers: one file each for a group of related families."""
