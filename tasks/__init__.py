"""Problems, how a text splits into steps, and what is right. Imports nothing of the other folders."""
