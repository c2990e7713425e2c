"""Online loss function learning: a small network is the loss, and it is learned while the model trains."""
