"""Speed, memory and accuracy of stock transformers against qvl. Run from a checkout: ``python -m bench``."""
