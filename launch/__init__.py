"""The command line and everything that joins the folders. Nobody imports it."""
