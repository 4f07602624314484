"""Images: how an encoded one becomes an encoder's input."""
