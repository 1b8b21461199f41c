"""Text: built-in corpora and files of the user, tokenised and cut into windows."""
