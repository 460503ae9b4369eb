package overlay

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
)

// plan returns the overlay of a stack of at least two layers. A read-only one
// has no upper directory, so that nothing is ever written to the layer, not
// even by the kernel.
func (m *mechanism) plan(chain lifecycle.Chain, readOnly bool) *mount.Overlay {
	dirs := m.uppers(chain)
	o := &mount.Overlay{
		UserXattr:   m.opts.UserXattr == "on",
		Metacopy:    m.opts.Metacopy,
		RedirectDir: m.opts.RedirectDir,
		XIno:        m.opts.XIno,
		Label:       chain.Layer().MountLabel,
		Options:     m.opts.MountOptions,
		Method:      m.method,
	}
	if m.opts.MountProgram == "" {
		o.Index = "off" // whatever the host's default is, see validate
		m.defaults(o)
	}
	if readOnly {
		o.Lowers = dirs
		o.Flags = mount.ReadOnly
		return o
	}
	o.Lowers, o.Upper, o.Work = dirs[1:], dirs[0], m.work(chain.Layer().ID)
	o.Volatile = m.opts.Volatile
	return o
}

// defaults sets what must not depend on how the kernel was configured: other
// tools turn these options on for a whole host. They are left alone where
// userxattr excludes them.
func (m *mechanism) defaults(o *mount.Overlay) {
	if o.UserXattr {
		return
	}
	if o.RedirectDir == "" {
		o.RedirectDir = "off"
		if m.conf.Redirect {
			o.RedirectDir = "follow"
		}
	}
	if o.Metacopy == "" {
		o.Metacopy = "off"
		if m.conf.Metacopy {
			o.Metacopy = "on"
		}
	}
	if o.Metacopy == "on" && o.RedirectDir != "on" {
		// Metacopy implies redirects of files, and the kernel refuses one
		// without the other.
		o.RedirectDir = "on"
	}
}

// Mount shows a layer at its path.
func (m *mechanism) Mount(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	id := chain.Layer().ID
	if len(chain) == 1 {
		return m.mountBase(chain.Layer(), mode)
	}
	plan := m.plan(chain, mode.ReadOnly)
	if !mode.ReadOnly {
		if err := m.prepareWork(chain.Layer()); err != nil {
			return err
		}
	}
	if m.opts.MountProgram != "" {
		return m.runProgram(ctx, plan, m.Path(id))
	}
	if mode.IDMap != nil {
		return m.mountMapped(plan, id, mode.IDMap)
	}
	return plan.Mount(m.Path(id))
}

// mountBase shows a base layer by a bind mount: an overlay with nothing below
// would only cost copy-ups.
func (m *mechanism) mountBase(rec *lifecycle.Record, mode lifecycle.Mode) error {
	var flags mount.Flags
	if mode.ReadOnly {
		flags |= mount.ReadOnly
	}
	if mode.IDMap == nil {
		return (&mount.BindMount{Source: m.upper(rec.ID), Flags: flags, Method: bindMethod(m.method)}).Mount(m.Path(rec.ID))
	}
	tree, err := mount.OpenTreeMapped(m.upper(rec.ID), mode.IDMap)
	if err != nil {
		return err
	}
	defer tree.Close()
	if mode.ReadOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return &os.PathError{Op: "mount_setattr", Path: tree.Name(), Err: err}
		}
	}
	return mount.Attach(tree, m.Path(rec.ID))
}

func bindMethod(m mount.Method) mount.Method {
	if m == mount.Descriptors { // overlays only
		return mount.Classic
	}
	return m
}

// prepareWork makes a layer ready to be mounted for writing. The mark that the
// kernel leaves of a volatile mount refuses the next mount: whether the layer
// survived is known here better (see recoverVolatile).
func (m *mechanism) prepareWork(rec *lifecycle.Record) error {
	if !m.conf.Volatile {
		return nil
	}
	incompat := filepath.Join(m.work(rec.ID), "work", "incompat")
	if err := os.RemoveAll(incompat); err != nil {
		return err
	}
	if !m.opts.Volatile {
		return nil
	}
	return os.WriteFile(m.volatilePath(rec.ID), []byte(layerdir.BootID()), 0o600)
}

// Unmount undoes Mount. Open files in the tree go on working, so that the layer
// may stay in use.
func (m *mechanism) Unmount(ctx context.Context, rec *lifecycle.Record) error {
	err := mount.IgnoreNotMounted(m.unmount(ctx, m.Path(rec.ID)))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Also what somebody else has unmounted, who was killed before this.
	err = m.Released(ctx, rec.ID)
	if errors.Is(err, layerfs.ErrInUse) {
		if m.opts.Logger != nil {
			m.opts.Logger.Warn("unmounted, but still in use", "driver", name, "layer", rec.ID, "reason", err)
		}
		return nil
	}
	return err
}

func (m *mechanism) unmount(ctx context.Context, path string) error {
	if m.opts.MountProgram != "" {
		return unmountProgram(ctx, path)
	}
	// At once, so that the next mount of the layer finds it free (index=on
	// makes that an error), and detached where somebody still works in it.
	err := mount.UnmountNow(path)
	if errors.Is(err, unix.EBUSY) {
		return mount.Unmount(path)
	}
	return err
}

// State looks at a layer's path. A mount whose program has died is unmounted:
// nobody can use it any more, and a Get must not take it for usable.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	st, err := m.state(id)
	if !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		return st, err
	}
	return lifecycle.State{}, mount.IgnoreNotMounted(m.unmount(context.Background(), m.Path(id)))
}

// query asks for the state of a mount; the kernel always answers.
func (m *mechanism) query(path string) (mount.State, error) {
	if m.opts.MountProgram == "" {
		return mount.Query(path)
	}
	return mount.Ask(path, m.answerWithin)
}

func (m *mechanism) state(id string) (lifecycle.State, error) {
	mounted, err := mount.IsMountPoint(m.Path(id))
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	st, err := m.query(m.Path(id))
	return lifecycle.State{Mounted: st.MountPoint, ReadOnly: st.ReadOnly}, err
}

// Mortal reports that mounts end with the process that serves them.
func (m *mechanism) Mortal() bool { return m.opts.MountProgram != "" }

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	infos, err := mount.Under(m.home)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, info := range infos {
		rel, err := filepath.Rel(m.home, info.Mountpoint)
		if err != nil {
			continue
		}
		if id, ok := strings.CutSuffix(rel, "/merged"); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// View shows the merged tree by a mount that is nowhere.
func (m *mechanism) View(ctx context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	if len(chain) == 1 {
		return lifecycle.View{Path: m.upper(chain.Layer().ID), Release: func() error { return nil }}, nil
	}
	plan := m.plan(chain, true)
	if m.opts.MountProgram != "" {
		return m.viewProgram(ctx, plan)
	}
	f, err := plan.Open()
	if err != nil {
		return lifecycle.View{}, err
	}
	// The dot makes it a directory to those who do not follow links.
	return lifecycle.View{Path: "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) + "/.", Release: f.Close}, nil
}

// Mounts holds a layer and returns the mounts that show it: one overlay, or for
// a base layer a bind mount. The options of an overlay are escaped for
// mount(2); more than 4095 bytes of them fit no mount(2).
func (d *Driver) Mounts(ctx context.Context, id string, opts *layerfs.GetOptions) ([]layerfs.Mount, error) {
	var mounts []layerfs.Mount
	err := lifecycle.Plan(ctx, d.frame, id, opts, func(_ context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
		if mode.IDMap != nil {
			return &layerfs.UnsupportedError{Feature: "mapping of owners without mounting", Reason: "mount(2) has no option for it"}
		}
		if d.m.opts.MountProgram != "" {
			return &layerfs.UnsupportedError{Feature: "mount specifications", Reason: "the layers are mounted by " + d.m.opts.MountProgram}
		}
		rw := "rw"
		if mode.ReadOnly {
			rw = "ro"
		}
		if len(chain) == 1 {
			mounts = []layerfs.Mount{{Type: "bind", Source: d.m.upper(id), Options: []string{"rbind", rw}}}
			return nil
		}
		plan := d.m.plan(chain, mode.ReadOnly)
		if err := plan.Validate(); err != nil {
			return err
		}
		if !mode.ReadOnly {
			if err := d.m.prepareWork(chain.Layer()); err != nil {
				return err
			}
		}
		mounts = []layerfs.Mount{{Type: "overlay", Source: "overlay", Options: append(plan.MountOptions(), rw)}}
		return nil
	})
	return mounts, err
}
