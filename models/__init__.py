"""Policies, reward models, step formats and generation engines."""
