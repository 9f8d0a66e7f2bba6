"""Text to tokens and back: tokenizers, chat templates, text as its tokens come."""
