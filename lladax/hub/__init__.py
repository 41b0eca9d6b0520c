"""Released weights in and out: Hugging Face folders to parameters and back."""
