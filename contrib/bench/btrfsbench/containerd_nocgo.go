//go:build !cgo

package main

import "context"

// snapshotter says that there is none: containerd's needs cgo.
func snapshotter(context.Context, string) (life func(context.Context, string) error, end func() error, err error) {
	return nil, func() error { return nil }, nil
}
