package drivertest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/layerfs/layerfs"
)

// Cross makes sure that two drivers understand each other: what Diff of one
// gives is applied to the other, layer by layer and across several, in both
// directions and all profiles, and gives the same trees and changes.
func Cross(t *testing.T, a, b Harness) {
	t.Helper()
	for _, pair := range [][2]Harness{{a, b}, {b, a}} {
		from, to := pair[0], pair[1]
		for _, p := range []layerfs.Profile{layerfs.ProfileFull, layerfs.ProfileOCI} {
			t.Run(fmt.Sprintf("%s-to-%s/profile=%s", from.Name, to.Name, p), func(t *testing.T) {
				e := newEnv(t, from)
				err := e.cross(to, tears(from) || tears(to), &layerfs.DiffOptions{Profile: p})
				if cerr := e.finish(); err == nil {
					err = cerr
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// tears reports whether a driver does not keep the names of one file together
// when an upper layer changes it.
func tears(h Harness) bool { return h.Deviates["HardLinkAcrossLayers"] != "" }

// crossSteps have something of everything that all backends can do; links that
// one layer makes and another changes only if both drivers keep them.
func crossSteps(links bool) [][]string {
	layers := []string{
		"file etc/hosts one\nfile etc/passwd root\nlink etc/alias etc/hosts\ndir var/empty 0700\nsymlink l etc/hosts\nfile usr/lib/a 1\nfile usr/lib/sub/b 2\nsparse hole 4096@1M\nfile x 1\nmtime x 1000000000.123456789",
		"file etc/passwd user\nrm usr/lib\nfile usr/lib/c 3\nchmod var/empty 0755\nrm l\ndir l\nfile l/f 4",
		"rm etc/alias\nfile new/deep/f 5\nlink new/g new/deep/f\nrm x\nsymlink x usr\nappend hole tail",
		"rm usr\nfile usr now-a-file\nrm l\nfile etc/hosts two",
	}
	if onLinux() {
		layers[0] += "\nxattr etc/passwd user.a 1\nfifo p 0600"
		layers[2] += "\nxattr etc/passwd user.a 2\nrm p\nsock s"
	}
	if onLinux() && os.Geteuid() == 0 {
		layers[0] += "\nchown etc/passwd 1:2\nchar dev/null 1 3 0666\nfile cap 1\nxattr cap security.capability 0x0100000200200000000000000000000000000000"
		layers[1] += "\nchown etc/passwd 3:4\nrm dev/null"
	}
	out := make([][]string, len(layers))
	for i, text := range layers {
		out[i] = lines(text)
		if !links {
			out[i] = slices.DeleteFunc(out[i], func(s string) bool { return strings.Contains(s, "etc/alias") })
		}
	}
	return out
}

func (e *env) cross(other Harness, torn bool, opts *layerfs.DiffOptions) error {
	s := e.newStack(e.d, "layer")
	for _, steps := range crossSteps(!torn) {
		if err := s.add(steps...); err != nil {
			return err
		}
	}
	// The other driver lives in an env of its own, whose clean-up is its own.
	o := newEnv(e.TB, other)
	err := e.crossTo(s, o, opts)
	if cerr := o.finish(); err == nil {
		err = cerr
	}
	return err
}

func (e *env) crossTo(s *stack, o *env, opts *layerfs.DiffOptions) error {
	how := compare{noSockets: true}
	if opts.Profile != layerfs.ProfileFull {
		how.wholeSeconds, how.fewXattrs = true, true
	}
	for i := range s.steps {
		if err := s.transfer(o.d, s.id(i), s.id(i-1), i, i-1, opts, how); err != nil {
			return err
		}
		if opts.Profile != layerfs.ProfileFull || i == 0 {
			continue
		}
		// What the other one says has changed is what has changed here.
		here, err := collect(s.d, e, s.id(i), s.id(i-1))
		if err != nil {
			return err
		}
		there, err := collect(o.d, o, s.id(i), s.id(i-1))
		if err != nil {
			return err
		}
		if err := sameChanges(without(here, "/s"), there); err != nil {
			return fmt.Errorf("layer %d: changes here (wanted) and there: %w", i, err)
		}
	}
	for base := -1; base < s.top()-1; base++ {
		if err := s.transfer(o.d, fmt.Sprintf("on-%d", base+1), s.id(base), s.top(), base, opts, how); err != nil {
			return err
		}
	}
	return nil
}

// without leaves out what a tar stream cannot hold.
func without(list []layerfs.Change, path string) []layerfs.Change {
	var out []layerfs.Change
	for _, c := range list {
		if c.Path != path {
			out = append(out, c)
		}
	}
	return out
}
