"""Configurations made for the user.

May import: host and what lies below.
"""
