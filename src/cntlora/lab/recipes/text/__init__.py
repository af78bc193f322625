"""Text: tables of the user's rows, classification, pairs, GLUE, language models."""
