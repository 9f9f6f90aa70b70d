"""Image bytes → picture → pixels → unit embedding; and model folders, which hold an encoder each."""
