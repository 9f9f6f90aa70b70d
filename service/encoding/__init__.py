"""Image bytes → picture → pixels → unit embedding, and the model folders that encoders come in."""
