"""Runs a transformer call: finds its step, decides whether to compute or bypass, and stores values for later steps."""
