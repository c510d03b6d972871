"""What happens at a transformer call: which step it is, whether to compute or bypass, and what is remembered."""
