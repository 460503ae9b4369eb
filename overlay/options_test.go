package overlay

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func TestOptionsValidate(t *testing.T) {
	for name, tc := range map[string]struct {
		opts Options
		want []string // parts of the error; none for no error
	}{
		"zero":              {},
		"all-kernel":        {opts: Options{RedirectDir: "on", Metacopy: "on", XIno: "auto", Volatile: true, MountOptions: []string{"uuid=off", "nodev"}}},
		"unknown-values":    {Options{UserXattr: "yes", RedirectDir: "1", Metacopy: "true", XIno: "y"}, []string{"UserXattr", "RedirectDir", "Metacopy", "XIno"}},
		"metacopy-alone":    {Options{Metacopy: "on"}, []string{"Metacopy needs RedirectDir"}},
		"userxattr-forge":   {Options{UserXattr: "on", RedirectDir: "on"}, []string{"could forge"}},
		"negative-quota":    {Options{Quota: layerfs.Quota{Bytes: -1}}, []string{"negative"}},
		"own-options":       {Options{MountOptions: []string{"lowerdir=/x", "index=on", "", "ro", "a\x00b"}}, []string{"driver's own", "hard links", "no name", "NUL"}},
		"relative-program":  {Options{MountProgram: "fuse-overlayfs"}, []string{"absolute"}},
		"program-and-flags": {Options{MountProgram: "/x", Volatile: true}, []string{"excludes"}},
		"durability":        {Options{Durability: 9}, []string{"durability"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.opts.validate()
			if tc.want == nil {
				require.NoError(t, err)
				return
			}
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
		})
	}
}
