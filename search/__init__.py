"""The thin inference loop: choose among samples, or grow them."""
