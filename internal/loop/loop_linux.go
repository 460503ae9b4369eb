package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// Device is an attached loop device. The open file holds it.
type Device struct {
	file *os.File
}

// attempts is how often Attach looks for another free device if somebody else
// takes the one it found. Each time one process has made progress, so with n
// of them n attempts are enough; the limit is for devices that always refuse.
const attempts = 256

// Attach makes a device of the file at path. It takes a few system calls, and
// waits while other processes take the devices it finds.
//
// The error matches [errors.ErrUnsupported] if this kernel has no loop devices
// or an option is not possible with this file. Nothing is attached if an error
// is returned. Discards of the device punch holes into the file, where its file
// system can do that.
//
// Kernel: LOOP_CONFIGURE since 5.8 (commit 3448914e8cc5) attaches in one step;
// before that, for a moment, the device is there without its flags.
func Attach(ctx context.Context, path string, opts *Options) (*Device, error) {
	if opts == nil {
		opts = &Options{}
	}
	if err := opts.validate(); err != nil {
		return nil, err
	}
	mode := os.O_RDWR
	if opts.ReadOnly {
		mode = os.O_RDONLY
	}
	backing, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	if err := checkBacking(backing); err != nil {
		return nil, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return nil, &layerfs.UnsupportedError{Feature: "loop device", Reason: err.Error()}
	}
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range attempts {
		d, err := attachFree(control, backing, opts)
		if !errors.Is(err, unix.EBUSY) {
			return d, err
		}
		// Not at once again: all who lost the same device would collide.
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(time.Duration(time.Now().Nanosecond()%1000) * time.Microsecond):
		}
	}
	return nil, &os.PathError{Op: "attach loop device", Path: path, Err: fmt.Errorf("%d devices in a row were taken by others: %w", attempts, unix.EBUSY)}
}

func checkBacking(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() && info.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return &os.PathError{Op: "attach loop device", Path: f.Name(), Err: fmt.Errorf("%v is no regular file or block device", info.Mode().Type())}
	}
	return nil
}

// attachFree tries one device. EBUSY says that somebody else has it now.
func attachFree(control, backing *os.File, opts *Options) (_ *Device, err error) {
	number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, &os.PathError{Op: "LOOP_CTL_GET_FREE", Path: control.Name(), Err: err}
	}
	file, err := openDevice(number, opts.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	config := sys.LoopConfig{FD: uint32(backing.Fd()), BlockSize: uint32(opts.SectorSize)}
	config.Info.Offset = uint64(opts.Offset)
	config.Info.SizeLimit = uint64(opts.Size)
	copy(config.Info.FileName[:len(config.Info.FileName)-1], backing.Name())
	for flag, on := range map[uint32]bool{
		unix.LO_FLAGS_READ_ONLY: opts.ReadOnly,
		unix.LO_FLAGS_AUTOCLEAR: opts.AutoClear,
		unix.LO_FLAGS_DIRECT_IO: opts.DirectIO || opts.DirectIOIfPossible,
	} {
		if on {
			config.Info.Flags |= flag
		}
	}
	err = errNoConfigure
	if !opts.NoConfigure {
		err = sys.Ioctl(file, "LOOP_CONFIGURE", unix.LOOP_CONFIGURE, &config)
		// Before 5.8 loop devices say EINVAL to unknown requests; what is wrong
		// with the arguments the older requests will say again.
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS) {
			err = errNoConfigure
		}
	}
	if errors.Is(err, errNoConfigure) {
		err = setInSteps(file, backing, &config, opts)
	}
	runtime.KeepAlive(backing)
	if err != nil {
		return nil, err
	}
	d := &Device{file}
	if opts.DirectIO {
		// LOOP_CONFIGURE takes the flag as a wish.
		if on, serr := d.DirectIO(); serr != nil || !on {
			err = errors.Join(serr, &layerfs.UnsupportedError{Feature: "direct I/O of a loop device", Reason: "refused for " + backing.Name()})
			return nil, errors.Join(err, d.clear())
		}
	}
	return d, nil
}

var errNoConfigure = errors.New("no LOOP_CONFIGURE")

// setInSteps attaches as before Linux 5.8, or undoes what it did.
func setInSteps(file, backing *os.File, config *sys.LoopConfig, opts *Options) (err error) {
	if err := sys.IoctlInt(file, "LOOP_SET_FD", unix.LOOP_SET_FD, int(backing.Fd())); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if cerr := sys.IoctlInt(file, "LOOP_CLR_FD", unix.LOOP_CLR_FD, 0); cerr != nil {
				err = fmt.Errorf("%w (rollback: %v)", err, cerr)
			}
			// EBUSY must not look like the device of somebody else: it is ours.
			if errors.Is(err, unix.EBUSY) {
				err = errors.New(err.Error())
			}
		}
	}()
	info := config.Info
	info.Flags &= unix.LO_FLAGS_AUTOCLEAR // the others have their own requests
	for try := 0; ; try++ {
		// EAGAIN while pages of the file are in the cache, since Linux 5.0; it
		// drops them each time.
		err := sys.Ioctl(file, "LOOP_SET_STATUS64", unix.LOOP_SET_STATUS64, &info)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EAGAIN) || try == 64 {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	if opts.SectorSize != 0 {
		if err := sys.IoctlInt(file, "LOOP_SET_BLOCK_SIZE", unix.LOOP_SET_BLOCK_SIZE, opts.SectorSize); err != nil {
			return err
		}
	}
	if opts.DirectIO || opts.DirectIOIfPossible {
		err := sys.IoctlInt(file, "LOOP_SET_DIRECT_IO", unix.LOOP_SET_DIRECT_IO, 1)
		if err != nil && (opts.DirectIO || !errors.Is(err, unix.EINVAL)) {
			return err
		}
	}
	return nil
}

func openDevice(number int, readOnly bool) (*os.File, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	name := "/dev/loop" + strconv.Itoa(number)
	// The node of a device that has just been added appears a moment later.
	for wait := time.Millisecond; ; wait *= 2 {
		f, err := os.OpenFile(name, mode, 0)
		if err == nil || !errors.Is(err, os.ErrNotExist) || wait > time.Second {
			return f, err
		}
		time.Sleep(wait)
	}
}

// Path returns the path of the device, such as /dev/loop0.
func (d *Device) Path() string { return d.file.Name() }

// File returns the open device, which belongs to d.
func (d *Device) File() *os.File { return d.file }

// Close gives the device up without detaching it. One with AutoClear goes away
// if it has no other user.
func (d *Device) Close() error { return d.file.Close() }

// Detach detaches the device, now or, if it is in use, when its last user is
// gone (since Linux 3.7), and closes it.
func (d *Device) Detach() error { return errors.Join(d.clear(), d.file.Close()) }

func (d *Device) clear() error {
	err := sys.IoctlInt(d.file, "LOOP_CLR_FD", unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil // is detached
	}
	return err
}

// Resize makes the device as long as its file is now.
func (d *Device) Resize() error {
	return sys.IoctlInt(d.file, "LOOP_SET_CAPACITY", unix.LOOP_SET_CAPACITY, 0)
}

// Size returns the size of the device in bytes.
func (d *Device) Size() (int64, error) {
	return d.file.Seek(0, 2)
}

// Status returns what the kernel knows of the device.
func (d *Device) Status() (sys.LoopInfo, error) {
	var info sys.LoopInfo
	err := sys.Ioctl(d.file, "LOOP_GET_STATUS64", unix.LOOP_GET_STATUS64, &info)
	return info, err
}

// DirectIO reports whether the device bypasses the page cache.
func (d *Device) DirectIO() (bool, error) {
	info, err := d.Status()
	return info.Flags&unix.LO_FLAGS_DIRECT_IO != 0, err
}

// Open opens an attached device, such as one of [Find]. The error matches ENXIO
// if it is not attached.
func Open(device string, readOnly bool) (*Device, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(device, mode, 0)
	if err != nil {
		return nil, err
	}
	d := &Device{f}
	if _, err := d.Status(); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// Find returns the paths of the devices whose file is the one at path, under
// whatever name it was attached. It asks each attached device, so the cost
// grows with their number.
func Find(path string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range files {
		device := "/dev/" + strings.Split(file, "/")[3]
		// Opening does not keep it: a device that is gone meanwhile is ENXIO.
		d, err := Open(device, true)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		info, err := d.Status()
		if cerr := d.Close(); err == nil {
			err = cerr
		}
		if errors.Is(err, unix.ENXIO) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if info.Inode == st.Ino && info.Device == kernelDev(st.Dev) {
			found = append(found, device)
		}
	}
	return found, nil
}

// kernelDev encodes a device number as struct loop_info64 has it:
// huge_encode_dev, include/linux/kdev_t.h, which is new_encode_dev.
func kernelDev(dev uint64) uint64 {
	major, minor := uint64(unix.Major(dev)), uint64(unix.Minor(dev))
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}
