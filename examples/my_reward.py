class Brightness:
    """Raises the mean brightness of a picture, from 0 (black) to 1 (white)."""

    def __call__(self, images, prompts, metadata):
        brightness = images.mean(axis=(1, 2, 3)) / 255
        return brightness, {"too_bright": brightness > 0.9}
