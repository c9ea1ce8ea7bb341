"""The server: a simulated memory manager (mm), the notifier core (notify), and the service around them (rpc)."""
