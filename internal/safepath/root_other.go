//go:build !linux

package safepath

import "os"

// Options are the options of [OpenRoot].
type Options struct {
	// NoOpenat2 has no meaning here.
	NoOpenat2 bool
}

// Root is a directory that lookups stay in. Here it is an [os.Root]: links that
// lead out of it are refused and not followed inside it.
type Root struct{ root *os.Root }

// OpenRoot opens a directory; links in dir itself are followed. opts may be
// nil.
func OpenRoot(dir string, _ *Options) (*Root, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Root{r}, nil
}

// Close releases the directory. Files opened through it stay open.
func (r *Root) Close() error { return r.root.Close() }

// Name returns the path OpenRoot was given.
func (r *Root) Name() string { return r.root.Name() }

// Open opens path with flags as for os.OpenFile.
func (r *Root) Open(path string, flags int) (*os.File, error) {
	for len(path) > 0 && path[0] == '/' {
		path = path[1:]
	}
	if path == "" {
		path = "."
	}
	return r.root.OpenFile(path, flags, 0)
}
