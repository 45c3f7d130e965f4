"""The Hugging Face Hub: client, access, downloads."""
