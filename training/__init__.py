"""The training room: pictures → contrastive pretraining → models/NAME. May import service, never the reverse."""
