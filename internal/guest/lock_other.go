//go:build !unix

package guest

import "github.com/layerfs/layerfs"

// Lock is for systems with flock; the guest's packages need one anyway.
func (c *Cache) Lock() (unlock func() error, err error) {
	return nil, &layerfs.UnsupportedError{Feature: "test guest", Reason: "needs apt-get and flock"}
}
