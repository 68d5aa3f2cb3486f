"""Training of deferral models: Z-initialisation, head-only training, callbacks for the stock `Trainer`."""
