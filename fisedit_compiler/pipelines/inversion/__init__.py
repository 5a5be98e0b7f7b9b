"""An editable generation of a picture that no model made."""
