"""Devices reached through the OpenSSH client: what they are, what is copied there, what runs there."""
